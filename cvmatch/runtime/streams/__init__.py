"""A stream of rows on Ray -> a directory of Parquet files, each row once.

`write` does it, `output_directory` is what lies on disk, `throughput` what each stage does.
"""
