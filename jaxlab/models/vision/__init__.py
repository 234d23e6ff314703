"""Images to tokens: vision towers of four kinds, their connectors, and where the tokens go in the text."""
