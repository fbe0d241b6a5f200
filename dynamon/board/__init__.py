"""The board: what users look at, as a page of its own and as a tab in TensorBoard.

The front end consists of plain ES modules and CSS in this folder, without a build step: ``board.js`` mounts it on runs.
The page of :mod:`dynamon.board.page` contains them; in the tab, ``tab.js`` requests them from
:mod:`dynamon.board.plugin`.
"""
