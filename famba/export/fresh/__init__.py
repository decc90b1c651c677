"""Code that runs an exported file in a process of its own; `famba.export.check` starts it by its text."""
