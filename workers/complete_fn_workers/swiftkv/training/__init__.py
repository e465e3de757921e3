"""Makes and scores SwiftKV checkpoints."""
