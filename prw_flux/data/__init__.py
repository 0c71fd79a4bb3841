"""Pictures from disk: safe opening, photo folders, line maps."""
