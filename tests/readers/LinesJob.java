import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.io.LongWritable;
import org.apache.hadoop.io.NullWritable;
import org.apache.hadoop.io.Text;
import org.apache.hadoop.mapreduce.Job;
import org.apache.hadoop.mapreduce.Mapper;
import org.apache.hadoop.mapreduce.lib.input.FileInputFormat;
import org.apache.hadoop.mapreduce.lib.input.TextInputFormat;
import org.apache.hadoop.mapreduce.lib.output.FileOutputFormat;
import org.apache.hadoop.mapreduce.lib.output.TextOutputFormat;

/**
 * A MapReduce job that copies every line of a directory tree to plain files: {@code LinesJob INPUT_URI OUTPUT_URI}.
 *
 * <p>It reads as any job does, by TextInputFormat with its default filter: names that begin with {@code _} or {@code .} are
 * hidden, at every depth. It has no reducer, because the order of lines and their grouping are not its business.
 */
public final class LinesJob {
    /** Drops the line's offset in its file, so that the output is the line alone. */
    public static final class Line extends Mapper<LongWritable, Text, NullWritable, Text> {
        @Override
        protected void map(LongWritable offset, Text line, Context context)
                throws java.io.IOException, InterruptedException {
            context.write(NullWritable.get(), line);
        }
    }

    public static void main(String[] args) throws Exception {
        if (args.length != 2) {
            System.err.println("usage: LinesJob INPUT_URI OUTPUT_URI");
            System.exit(64);
        }
        Configuration conf = new Configuration();
        conf.set("mapreduce.framework.name", "local");
        Job job = Job.getInstance(conf, "lines of " + args[0]);
        job.setJarByClass(LinesJob.class);
        job.setMapperClass(Line.class);
        job.setNumReduceTasks(0);
        job.setInputFormatClass(TextInputFormat.class);
        job.setOutputFormatClass(TextOutputFormat.class);
        job.setOutputKeyClass(NullWritable.class);
        job.setOutputValueClass(Text.class);
        FileInputFormat.setInputDirRecursive(job, true);
        FileInputFormat.addInputPath(job, new Path(args[0]));
        FileOutputFormat.setOutputPath(job, new Path(args[1]));
        System.exit(job.waitForCompletion(true) ? 0 : 1);
    }
}
