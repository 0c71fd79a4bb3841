"""Bridges to other libraries; each module needs the extra that it names and is imported by name."""
