"""The version of this package; setup.cfg reads it, and every saved config records it."""

VERSION = "0.1.0"
