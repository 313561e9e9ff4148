"""Reports for people: one page, and the same in Markdown, CSV and JSON, from records on disk. No torch."""
