"""Images from files through each family's own preprocessing, and the text around them."""

from jaxlab.processing.processor import Processor, load_processor

__all__ = ["Processor", "load_processor"]
