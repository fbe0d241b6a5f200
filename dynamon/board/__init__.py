"""The board: what users look at, as a page of its own.

The front end is plain ES modules and CSS in this folder, with no build step: ``board.js`` mounts it on runs that
``packed`` unpacks from :func:`payload`. :func:`page` puts both into one HTML file.
"""

from dynamon.board.page import page
from dynamon.board.payload import payload

__all__ = ["page", "payload"]
