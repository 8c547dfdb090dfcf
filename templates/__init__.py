"""The three-tier dialog as data: Jinja templates, one per file."""
