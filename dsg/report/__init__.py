"""From the files of a run to what people read: HTML page, terminal table, overview picture."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
