/* Sets of addresses: soft_private.h has what each function does. */
#include <stdlib.h>

#include "soft_private.h"

static uint64_t *soft_place(const struct soft_set *set, uint64_t address)
{
    size_t i = address * 0x9e3779b97f4a7c15 >> 32 & (set->room - 1);
    while (set->places[i] && set->places[i] != address)
        i = (i + 1) & (set->room - 1);
    return &set->places[i];
}

bool soft_set_has(const struct soft_set *set, uint64_t address)
{
    return address ? set->count && *soft_place(set, address) : set->has_zero;
}

static bool soft_set_grow(struct soft_set *set)
{
    const struct soft_set old = *set;
    set->room = old.room ? old.room * 2 : 256;
    set->places = calloc(set->room, sizeof *set->places);
    if (!set->places) {
        *set = old;
        return false;
    }
    for (size_t i = 0; i < old.room; i++)
        if (old.places[i])
            *soft_place(set, old.places[i]) = old.places[i];
    free(old.places);
    return true;
}

bool soft_set_add(struct soft_set *set, uint64_t address)
{
    if (!address)
        return set->has_zero = true;
    if (set->count * 2 >= set->room && !soft_set_grow(set))
        return false;
    *soft_place(set, address) = address;
    set->count++;
    return true;
}
