"""Textbook loops of SOAP, Shampoo and MARS in float64: slow, one matrix at a time, to be read beside the papers.

The documentation shows them and the tests compare with them. They import nothing of the package, and nothing in the
package imports them.
"""
