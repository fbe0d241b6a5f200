"""The board: what users look at, as a page of its own (:mod:`dynamon.board.page`) and as a tab of TensorBoard
(:mod:`dynamon.board.plugin`).

The front end is plain ES modules and CSS in this folder, with no build step: ``board.js`` mounts it on runs.
``packed.js`` makes them from :func:`dynamon.board.payload.payload`, ``tab.js`` from what the plugin answers.
"""
