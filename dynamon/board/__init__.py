"""The board: what users look at, as a page of its own and as a tab in TensorBoard.

The front end is plain ES modules and CSS in this folder, with no build step: ``board.js`` mounts it on runs. In the
page of :mod:`dynamon.board.page` they are unpacked from what lies in it; in the tab ``tab.js`` asks
:mod:`dynamon.board.plugin` for them.
"""
