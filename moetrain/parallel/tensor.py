def copies(model):
    return []
