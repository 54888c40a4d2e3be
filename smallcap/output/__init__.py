"""The output of a captioning run: its columns, its parts, and which rows of the input they hold."""
