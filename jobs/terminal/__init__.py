"""What people type and see: options, help, tables, and errors in our own words."""
