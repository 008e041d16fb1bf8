"""From run folders to tables, figures and pages: reads files only, never a model or a data set."""
