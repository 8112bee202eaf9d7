"""What models are given: windows of text, and images, from files and from the Hub."""
