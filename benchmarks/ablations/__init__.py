"""What maps of other shapes and from other text would draft, by closed form (docs/ablations.md)."""
