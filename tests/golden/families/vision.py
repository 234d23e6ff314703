VISION = {}
