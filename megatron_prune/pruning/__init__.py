"""Which group, and when.

groups         a module per kind of group: what may leave together
selector       the choice of one
schedule       when: an account of credits;  spike_guard  when not
second_order   survivors take over
history        the record;  plots  as figures
"""
