"""The folder of a search: what was asked, what was found, tables, and measuring anew."""
