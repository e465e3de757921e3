"""FLOPs and bytes of a model, by arithmetic on its shape: nothing here is measured, and nothing heavy is imported."""
