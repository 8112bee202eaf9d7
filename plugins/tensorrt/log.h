// Sentences for the user, through the logger of the TensorRT that loaded the library.
#pragma once

#include <string>

namespace nmsparse {

void log_error(std::string const& what);

}  // namespace nmsparse
