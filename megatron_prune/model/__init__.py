"""What can shrink: widths (`architecture`), slots (`layout`), meaning of every dim (`param_axes`), and the layers
built on them.
"""
