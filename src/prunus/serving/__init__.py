"""Servers that need to be told about models whose layers differ in width."""
