"""What peers say to each other, and the rules of saying it. Pure: values in, values out."""
