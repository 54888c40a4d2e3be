"""What people type and see: options, help, tables, and errors."""
