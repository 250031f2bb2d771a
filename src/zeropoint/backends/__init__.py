"""What is true of each backend: its table of operators, its configurations, its lowering."""
