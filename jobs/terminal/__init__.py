"""What people type and see: arguments, tables, and errors in their own words."""
