"""What a captioning run writes: its columns, its parts, and which rows of the input they hold."""
