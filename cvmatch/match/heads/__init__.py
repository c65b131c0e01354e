"""What stands behind the towers: features of a query and of tiles -> vectors, and their scores.

`branches`: each compares one thing of the query with one of the tile, and their cosines are added.
`joint`: the published form, whose candidate embedding needs the query's own A.
"""
