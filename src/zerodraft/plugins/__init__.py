"""What other programs load: parts of this package in the forms that they ask for."""
