"""SwiftKV checkpoints made and scored."""
