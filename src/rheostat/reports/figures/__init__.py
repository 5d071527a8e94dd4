"""The drawings of the report: each takes its width in CSS pixels and returns an ``<svg>`` element, or None where the
results lack what it shows. Below 500 pixels the panels and labels are arranged for a phone.
"""
