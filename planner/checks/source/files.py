def check_source(path, required=True):
    return []
