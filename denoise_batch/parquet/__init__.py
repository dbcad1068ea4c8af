"""Parquet files as they are: looked at, read, written, verified and joined, damaged ones among them."""
