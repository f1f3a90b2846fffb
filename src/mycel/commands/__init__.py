"""The commands of `mycel`, by what they are about. Each module imports what it needs when it runs."""
