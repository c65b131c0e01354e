"""Any photo of a place -> the panorama that the models were trained on.

`metadata` reads what a file says of itself, `view` decides which directions it shows, `band`
samples them, `reading` does all of it.
"""
