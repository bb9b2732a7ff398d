"""Probes: how good is the representation after each block?"""
