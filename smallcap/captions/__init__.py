"""Captions files: one reader of COCO, Karpathy, CSV, TSV, JSONL and Parquet for dumps, references and training."""
