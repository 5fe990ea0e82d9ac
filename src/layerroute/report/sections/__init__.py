"""The parts of a report below its verdict: from figures to paragraphs, tables and charts."""
