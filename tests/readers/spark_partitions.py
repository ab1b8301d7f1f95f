"""Counts the lines of each partition of a table of hours with Spark: spark_partitions.py INPUT_URI OUTPUT_FILE SCRATCH_FOLDER.

The partitions are found as Spark and Hive do it, by the names of the folders, and one day is read by a condition on them. The output
has one line for each partition, "DT HR COUNT", and then those of the condition, "only DT HR COUNT".
"""

import sys

from pyspark.sql import SparkSession


def main(source, target, scratch):
    spark = (
        SparkSession.builder.master("local[2]")
        .appName("partitions of " + source)
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.local.dir", scratch)
        .config("spark.sql.warehouse.dir", scratch)
        # Or hr=05 would be the number 5.
        .config("spark.sql.sources.partitionColumnTypeInference.enabled", "false")
        .getOrCreate()
    )
    lines = spark.read.text(source)
    counts = lines.groupBy("dt", "hr").count().collect()
    only = lines.where("hr = '07'").groupBy("dt", "hr").count().collect()
    with open(target, "w", encoding="utf-8") as out:
        for row in counts:
            print(row["dt"], row["hr"], row["count"], file=out)
        for row in only:
            print("only", row["dt"], row["hr"], row["count"], file=out)
    spark.stop()


if len(sys.argv) != 4:
    sys.exit(__doc__)
main(*sys.argv[1:])
