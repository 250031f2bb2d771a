"""The HTML report: its charts, tables and drawing."""
