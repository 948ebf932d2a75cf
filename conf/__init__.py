"""What can be asked for: YAML groups, the typed schema over them, and the rules between keys. Never imports torch."""
