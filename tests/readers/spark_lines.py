"""Copies every line of a directory tree to plain files with Spark: spark_lines.py INPUT_URI OUTPUT_URI SCRATCH_FOLDER.

It reads as any job does, by spark.read.text with its defaults: hidden names are ignored, dt= and hr= folders are partitions.
"""

import sys

from pyspark.sql import SparkSession


def main(source, target, scratch):
    spark = (
        SparkSession.builder.master("local[2]")
        .appName("lines of " + source)
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.local.dir", scratch)
        .config("spark.sql.warehouse.dir", scratch)
        .getOrCreate()
    )
    spark.read.text(source).select("value").write.text(target)
    spark.stop()


if len(sys.argv) != 4:
    sys.exit(__doc__)
main(*sys.argv[1:])
