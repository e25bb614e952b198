"""Textbook loops of SOAP, Shampoo and MARS in float64: slow, one matrix at a time, to be read together with the
papers.

The documentation shows them, and the tests compare the optimizers with them. They import nothing else from the
package, and nothing in the package imports them.
"""
