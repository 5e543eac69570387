"""Caption metrics on tokenized captions, and how sure they are."""
