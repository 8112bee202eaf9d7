#include "fields.h"

#include <bitset>
#include <cstring>

namespace nmsparse {

namespace {

std::array<int32_t Fields::*, Fields::COUNT> const MEMBERS = {
    &Fields::keep,   &Fields::group,       &Fields::shift_mode,   &Fields::variance,
    &Fields::inputs, &Fields::gemv_tokens, &Fields::sparse_tokens};

bool has(int32_t inputs, Input input) { return (inputs >> int(input) & 1) != 0; }

std::string fault(Fields const& fields) {
    // With as few channels as there can be: how many there are is known with the shapes.
    if (fields.group < 0 || fields.group > MAX_GROUP) return "group must be 1 to 1024";
    if (char const* found = refusal(fields.layer(8 * fields.group, 8, 0))) return found;
    if (fields.variance != 0 && fields.variance != 1) return "variance must be 0 or 1";
    if (fields.inputs < 0 || fields.inputs >> int(Input::COUNT) != 0) return "inputs must be bits of the op's inputs";
    if (!has(fields.inputs, Input::X) || !has(fields.inputs, Input::W)) return "inputs must have X and W";
    for (Input const input : {Input::RESIDUAL_IN, Input::RESIDUAL_OUT, Input::SPARSE, Input::WEIGHT_SCALE})
        if (has(fields.inputs, input))
            return std::string("input ") + INPUT_NAMES[int(input)] + " must not be there: no kernel has it yet";
    auto const mode = ShiftMode(fields.shift_mode);
    if (has(fields.inputs, Input::SHIFT) != (mode == ShiftMode::STATIC))
        return "input shift must be there with shift_mode static (1), and only then";
    if (has(fields.inputs, Input::ROW_SUM) != (mode >= ShiftMode::TOKEN_MEAN))
        return "input row_sum must be there with shift_mode token_mean (2) or token_median (3), and only then";
    return "";
}

}  // namespace

std::string Fields::read(nvinfer1::PluginFieldCollection const* given, Fields& fields) {
    if (given == nullptr || given->nbFields < 0 || (given->nbFields > 0 && given->fields == nullptr))
        return "fields must be given";
    std::array<bool, COUNT> found{};
    for (int i = 0; i < given->nbFields; ++i) {
        nvinfer1::PluginField const& field = given->fields[i];
        int which = 0;
        while (which < COUNT && (field.name == nullptr || std::strcmp(field.name, NAMES[which]) != 0)) ++which;
        std::string const name = field.name == nullptr ? "(no name)" : field.name;
        if (which == COUNT) return "field " + name + " must be one of the op's";
        if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr)
            return "field " + name + " must be one 32-bit integer";
        if (found[which]) return "field " + name + " must be given once";
        found[which] = true;
        std::memcpy(&(fields.*MEMBERS[which]), field.data, sizeof(int32_t));
    }
    for (int i = 0; i < COUNT; ++i)
        if (!found[i]) return std::string("field ") + NAMES[i] + " must be given";
    std::string const wrong = fault(fields);
    return wrong.empty() ? "" : wrong + ", got " + fields.text();
}

std::array<nvinfer1::PluginField, Fields::COUNT> Fields::as_fields() const {
    std::array<nvinfer1::PluginField, COUNT> found;
    for (int i = 0; i < COUNT; ++i)
        found[i] = {NAMES[i], &(this->*MEMBERS[i]), nvinfer1::PluginFieldType::kINT32, 1};
    return found;
}

int Fields::index_of(Input input) const {
    if (!has(inputs, input)) return -1;
    return int(std::bitset<32>(uint32_t(inputs) & ((1U << int(input)) - 1)).count());
}

int Fields::input_count() const { return int(std::bitset<32>(uint32_t(inputs)).count()); }

Layer Fields::layer(int k, int n, int sm) const {
    return {k, n, keep, group, ShiftMode(shift_mode), variance, gemv_tokens, sparse_tokens, sm};
}

std::string Fields::text() const {
    std::string found;
    for (int i = 0; i < COUNT; ++i)
        found += std::string(i == 0 ? "" : ", ") + NAMES[i] + " " + std::to_string(this->*MEMBERS[i]);
    return found;
}

}  // namespace nmsparse
